"""What runs came to, for people: a page, pictures, and a bar while they go on."""
