"""Names that the command line knows before anything heavy is imported."""

SKILLS = ("walk", "reach", "squat", "step")
TASKS = ("far_reach", "button_press", "box_push", "package_lift", "football_shoot")
KINDS = ("per_joint", "scalar", "switch", "mcp")
