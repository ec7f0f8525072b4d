"""Surgery on models: each operation verifies itself or refuses, and reports what it did and what it left alone."""
