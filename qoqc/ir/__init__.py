"""The words of the compiler: specs, ops, their reference, and the rules of a rewritten graph."""
