"""Where image-text pairs come from: folders, tables, tars, synthetic shapes."""
