"""Pictures for people: HTML pages that need nothing beside themselves, in light and dark."""
