"""One file per language: `describe_in_...` gives several true captions of a scene."""
