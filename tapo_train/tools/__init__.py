"""Tools a policy can call: zoom, text search, image search, and the toolbox that guards them."""
