"""Shards written anew with what teachers make of them, so that training needs no teacher."""
