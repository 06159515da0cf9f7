"""Start the workbench: `python app.py [--port N] [--host ADDRESS]`. A Space runs this file; `workbench/app.py` does the work."""

from workbench.app import main

if __name__ == "__main__":
    main()
