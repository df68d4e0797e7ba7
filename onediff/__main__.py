from onediff.cli.main import main

main()
