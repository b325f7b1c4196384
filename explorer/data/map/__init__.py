"""A map: images as points of a plane, near where their vectors are near, with what is known of them as ads."""
