"""Trains: torchrun --standalone --nproc-per-node 2 launch/train.py +experiment=gpt_moe_8e. All of it is in moetrain/launch.py."""

import sys

from moetrain.launch import main

if __name__ == "__main__":
    sys.exit(main())
