"""`cmdgen` and `python -m cmdgen`."""

try:
    import atexit
    import gc
    import signal
    import sys

    # the last collection would walk through all that torch's modules hold: 0.4 s of CPU; without it
    # Triton's bindings print what is left
    atexit.register(lambda: None if "triton" in sys.modules else gc.freeze())

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # while modules are imported, Ctrl-C ends the process in silence
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cmdgen.cli.app import main
except KeyboardInterrupt:
    raise SystemExit(130) from None

if __name__ == "__main__":
    main()
