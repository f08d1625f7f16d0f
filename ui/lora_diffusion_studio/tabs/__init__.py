"""The tabs of the page: components and event handlers. The Blend tab is a package, the others are one file each."""
