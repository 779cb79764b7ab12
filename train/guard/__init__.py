"""What keeps a run alive: bad steps skipped, rewinding, a watchdog."""
