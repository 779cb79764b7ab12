"""Addresses of shards, and the file systems behind them."""
