"""``python -m heimdall_onnx`` is the command line."""

from heimdall_onnx.cli.main import main

if __name__ == "__main__":
    main(prog_name="heimdall-onnx")
