"""Ways into other libraries, each behind an extra of its own and imported only by who asks for it."""
