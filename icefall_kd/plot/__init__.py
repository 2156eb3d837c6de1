"""Pictures of models at work; ``icefall-kd plot`` draws them."""
