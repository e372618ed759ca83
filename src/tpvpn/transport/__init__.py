"""Ways to a byte stream to the manager; each begins with the same HTTP/1.1 upgrade."""
