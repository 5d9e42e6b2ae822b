"""What a recipe will need: memory, time, disk and communication, and the least time a phase can take."""
