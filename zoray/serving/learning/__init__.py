"""Jobs: asked for, run one at a time, made versions, judged, and live or not."""
