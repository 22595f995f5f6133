"""From the services' values to the shapes of `base.wire.rest`, one module a subject."""
