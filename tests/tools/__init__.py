"""Programs that check the data and the tests themselves; each says how it is run."""
