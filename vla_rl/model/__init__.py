"""The policy: OpenVLA's network, its adapter, its files, what goes in and what comes out."""
