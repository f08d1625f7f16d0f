"""The Blend tab: layout, adapter slots and events."""
