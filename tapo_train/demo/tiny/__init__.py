"""A policy of about one million parameters in the format of the big ones."""
