"""Where shards are kept: addresses, remote files, and the bounded cache on this machine."""
