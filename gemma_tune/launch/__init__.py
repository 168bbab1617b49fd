"""Starting on many processes and machines, by engines that exist: accelerate's launcher, and the scheduler's job files.

nodes.py     what the scheduler says in the environment: how many machines, which one is this, where to meet
settings.py  what an accelerate file says about the processes
world.py     how many processes there will be, and the check that as many came
parent.py    a process whose launcher is killed ends too
start.py     accelerate's launcher in this process; its failures -> our errors and exit codes
failure.py   what a process leaves for its launcher when it fails
jobs.py      job files for SLURM, Kubeflow, SkyPilot and Ray; templates/ holds their text
"""
