"""The compiler: checkpoint -> graph -> passes -> lowering -> engine."""
