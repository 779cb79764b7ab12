"""A folder of images as an index: what lies in it, what is known of it, and how the two are brought together."""
