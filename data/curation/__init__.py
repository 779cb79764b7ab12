"""Filters that choose samples, and the selection they write."""
