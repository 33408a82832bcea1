"""reshard inside the engines: what they find by entry points when it is installed beside them. Nothing here is imported by reshard itself."""
