"""Many runs by one file: what is done is skipped, what was cut off goes on, and a table says how they compare."""
