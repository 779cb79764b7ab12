"""The search service over HTTP and its page; what a request does without HTTP stands in `served_index`."""
