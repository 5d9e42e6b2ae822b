"""A language model as labeler, local or behind an API, and how accurate it is."""
