"""The `rlhf` command and the pipeline that chains the stage programs; recipes and DeepSpeed settings beside them."""
