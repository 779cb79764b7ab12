"""From a target of recall, latency and memory to the index type that meets it, measured."""
