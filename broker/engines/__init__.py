"""What happens to an event between publish and delivery: the port, and an adapter for each engine."""
