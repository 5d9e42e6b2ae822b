"""Parameter-efficient methods: adapters on a frozen base, how they are saved, merged and shared."""
