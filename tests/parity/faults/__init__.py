"""The catalogue of faults, and the runner that injects them one at a time and counts what gx.check_parity says."""
