"""What stands in for sglang where a test is about processes, ports and flags: see launch_server."""
