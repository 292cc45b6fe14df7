"""The reference trainer for Terminal Velocity Matching, built on flashjvp."""
