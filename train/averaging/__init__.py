"""Weights averaged: while training, over runs, between two models."""
