"""Stands in for tools/plan.py and tools/doctor.py where the scripts are tested: says what it was asked.

stub.planned=SECONDS  what a step is planned to take; stub.planning=SECONDS: how long it thinks
"""

import sys
import time

given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
print("planner asked:", *sys.argv[1:], flush=True)
time.sleep(float(given.get("stub.planning", "0")))
print(f"3 steps of {given.get('stub.planned', '0.3')} s = 0.0 hours x 4 GPUs = 0 GPU hours")
