"""Recipes: a preset with the commands around it, and what is expected of it."""
