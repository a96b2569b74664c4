"""`train` on a slow disk, to be killed while it writes; its words are SECONDS key=value ..."""

import sys
import time

from launch import train
from parallel import parts


def main() -> int:
    """Sleep so long before each file of a checkpoint is written."""
    seconds, real = float(sys.argv[1]), parts.save_file

    def slow(*args, **kwargs):
        time.sleep(seconds)
        real(*args, **kwargs)

    parts.save_file = slow
    return train.main(sys.argv[2:])
