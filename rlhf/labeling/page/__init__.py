"""The page on which people rank, its store and its server."""
