"""The local RunPod: the job API and the worker's side of the wire, on this machine, for nothing.

`platform.py` is the state machine (pure, takes the time as an argument), `server.py` the HTTP around it,
`__main__.py` the command line. docs/local-runpod.md describes the fault knobs.
"""
