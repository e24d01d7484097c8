"""HTTP on the root: routes, dialects of the API, streams, the page. Needs the extra `serve`."""
