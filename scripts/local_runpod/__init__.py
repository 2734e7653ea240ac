"""The local RunPod: job API, management API and the worker's side of the wire, on this machine, for nothing.

Pure, with the time as an argument: `platform.py` is one endpoint's queue; `management.py` the account (`serverless.py`,
`pods.py`, `resources.py`, `billing.py` are its parts, `basics.py` what they share), `bodies.py` what requests may hold,
`catalog.py` what can be rented, `faults.py` what can go wrong. Around them: `server.py` and `api.py` the HTTP, `fleet.py`
the worker processes, `__main__.py` the command line. docs/local-runpod.md describes the routes and the knobs.
"""
