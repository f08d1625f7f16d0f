"""The tabs of the app: layout and wiring, one file each."""
