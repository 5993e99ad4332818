"""Encodings: how stored bytes become numbers. One file per family, one table (`registry`) that lists them."""
