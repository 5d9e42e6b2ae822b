"""One rank of a distributed test: runs a list of stages in one process, which is started once and not once a stage.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/ranks.py JOBS.json

JOBS.json is a list of [stage, arguments]; the first stage that fails ends the rank with its exit code.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

torch.set_num_threads(1)


def main() -> int:
    """Run the jobs of the file that is named on the command line."""
    dist.init_process_group("gloo")
    for stage, arguments in json.loads(Path(sys.argv[1]).read_text()):
        code = importlib.import_module(f"stages.{stage}").main(arguments)
        unset_hf_deepspeed_config()  # SFT's ZeRO-3 would partition whatever a later stage of this process loads
        print(f"{stage} {arguments[1:3]}: {code}", flush=True)
        if code:
            return code
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
